"""`fastbert` as the shell calls it, in this process."""

from fastbert.cli.main import main


def run(*argv) -> int:
    """The exit status of `fastbert ARGV...`; what is no text, such as a path or a number, becomes one."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as leaving:  # argparse
        return leaving.code
