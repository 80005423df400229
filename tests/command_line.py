"""`fastbert` as a shell calls it, in this process."""

from fastbert.cli.main import main


def run(*argv) -> int:
    """Runs `fastbert ARGV...`, each argument as a string, and returns the exit status."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as leaving:  # argparse
        return leaving.code
