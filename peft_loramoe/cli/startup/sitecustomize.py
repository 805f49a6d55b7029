"""Registers LORAMOE in the Python processes that a program under ``peft_loramoe run`` starts.

`run` puts this folder on PYTHONPATH, so Python imports this file when it starts. It makes way for the sitecustomize
that it hides, if there is one, and waits: if the process imports peft, peft_loramoe is imported right after it. Other
processes pay nothing.
"""

import os
import sys


HERE = os.path.dirname(os.path.abspath(__file__))


class RegisterAfterPeft:
    """Finds `peft` where it is, and has peft_loramoe imported once peft is."""

    def find_spec(self, name, path=None, target=None):
        """See `importlib.abc.MetaPathFinder`.

        Also called, more than once, by those who only ask whether there is a peft.
        """
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                try:
                    import peft_loramoe  # noqa: F401
                except ModuleNotFoundError as error:  # another environment's Python
                    if error.name != "peft_loramoe":
                        raise
                    print(
                        f"peft_loramoe is not installed for {sys.executable}: LORAMOE is unknown there.",
                        file=sys.stderr,
                    )

            spec.loader.exec_module = execute_and_register
        return spec


sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]
this = sys.modules.pop(__name__)
try:
    import sitecustomize  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
    sys.modules[__name__] = this
finally:  # Python reports what the other file raises, and goes on
    sys.meta_path.insert(0, RegisterAfterPeft())
