"""Bad inputs of every kind, as a user would give them, run through the command line: each must end in a clear sentence.

`python -m tests.campaign` runs all and prints the counts; each is a test, of which every twelfth is in `make test`."""
