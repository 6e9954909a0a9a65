"""What stands between the command line and a verb: configuration, help, errors as one sentence, processes."""
