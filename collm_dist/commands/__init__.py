"""Commands: the bodies of the scripts in launch/ and of the subcommands of ``collm-dist``."""
