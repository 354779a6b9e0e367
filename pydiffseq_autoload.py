"""Makes the stock fairseq commands know pydiffseq without ``--user-dir``.

``pydiffseq.pth`` imports this module at every interpreter start, so it imports nothing but the standard library and
only leaves a finder behind. When fairseq is imported, the finder imports ``pydiffseq.fairseq_plugin`` right after it,
which registers the task, the models and the criterion. ``PYDIFFSEQ_AUTOLOAD=0`` switches it off. It is a top-level
module because importing it from inside ``pydiffseq`` would import that package each time.
"""

import importlib
import importlib.util
import os
import sys

PLUGIN = "pydiffseq.fairseq_plugin"


class PluginFinder:
    """A ``sys.meta_path`` finder that wraps the loader of ``fairseq`` and is gone once fairseq is imported.

    Until then it stays: ``importlib.util.find_spec("fairseq")``, by which programs ask whether fairseq is there, finds
    without importing.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fairseq":
            return None
        position = sys.meta_path.index(PluginFinder)
        del sys.meta_path[position]
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(position, PluginFinder)
        if spec is None or not hasattr(spec.loader, "exec_module") or spec.origin is None:
            return spec  # no fairseq, or only a folder of that name
        execute = spec.loader.exec_module

        def execute_then_register(module):
            if PluginFinder in sys.meta_path:
                sys.meta_path.remove(PluginFinder)
            execute(module)
            register()

        spec.loader.exec_module = execute_then_register
        return spec


def register():
    """Import the plug-in; a failure must not take fairseq away from those who use it without pydiffseq."""
    if names_other_copy(sys.argv):
        return
    try:
        importlib.import_module(PLUGIN)
    except Exception as error:
        print(f"pydiffseq: the fairseq plug-in was not loaded ({type(error).__name__}: {error}); "
              "PYDIFFSEQ_AUTOLOAD=0 silences this", file=sys.stderr)


def names_other_copy(argv):
    """Whether ``--user-dir`` (or hydra's ``common.user_dir``) points to another copy of the package.

    That copy is then the one to use, and fairseq refuses a second module of the same name.
    """
    spec = importlib.util.find_spec("pydiffseq")
    installed = os.path.realpath(os.path.dirname(spec.origin)) if spec and spec.origin else None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        option, _, value = word.partition("=")
        if option not in ("--user-dir", "common.user_dir"):
            continue
        folder = os.path.realpath(value or following)
        package = os.path.dirname(folder) if os.path.basename(folder) == "fairseq_plugin" else folder
        if os.path.basename(package) == "pydiffseq" and os.path.isdir(package) and package != installed:
            return True
    return False


if os.environ.get("PYDIFFSEQ_AUTOLOAD", "1") != "0" and "fairseq" not in sys.modules:
    sys.meta_path.insert(0, PluginFinder)
