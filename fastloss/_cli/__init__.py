"""The commands of `python -m fastloss`."""
