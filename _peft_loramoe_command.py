"""Entry point of the console script `peft-loramoe`, outside the package so that help does not wait for torch.

`import peft_loramoe` imports torch and PEFT, to register the tuner. While `PARSING` is true, also under
`python -m peft_loramoe`, it does not; the command line does so itself, once its arguments are known to be right
(`peft_loramoe.cli.program.import_package`).
"""

PARSING = False


def main():
    """Run the command line; see `peft_loramoe.cli.main`."""
    global PARSING
    PARSING = True
    from peft_loramoe.cli import main as command_line

    return command_line()
