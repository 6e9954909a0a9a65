"""What stands between the command line and a verb: composing and checking the configuration, help, errors as one sentence, processes."""
