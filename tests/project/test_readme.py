"""The README agrees with the registry."""

from pathlib import Path

import pytest

from fastloss.__main__ import main
from fastloss._cli.losses import HEAD, table

README = Path(__file__).parents[2] / "README.md"


def test_table_of_losses_is_the_registrys():
    assert table() in README.read_text(), (
        "run `make format`, or `python -m fastloss losses --write README.md`"
    )


def test_table_is_replaced_from_its_first_line_to_its_last(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{HEAD}\n|---|---|---|---|\n| `gone_loss` | | | |\n\nafter\n")
    for _ in range(2):
        assert main(["losses", "--write", str(page)]) == 0
        assert page.read_text() == f"before\n\n{table()}\n\nafter\n"


@pytest.mark.parametrize("tables", [0, 2])
def test_no_table_to_replace_is_an_error(tables, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{HEAD}\n\n" * tables)
    assert main(["losses", "--write", str(page)]) == 2
    assert "page.md" in capsys.readouterr().err
    assert page.read_text() == f"{HEAD}\n\n" * tables
