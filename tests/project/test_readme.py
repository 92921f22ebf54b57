"""The README agrees with the registry."""

from pathlib import Path

from fastloss._cli.losses import table

README = Path(__file__).parents[2] / "README.md"


def test_table_of_losses_is_the_registrys():
    assert table() in README.read_text(), "put the output of `python -m fastloss losses` into README.md"
