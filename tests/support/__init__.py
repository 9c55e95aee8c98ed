"""What tests share. Imports nothing of the tests themselves, but for `tests.programs`."""
