"""Optional packages, imported where a metric needs them."""

import importlib


def extra(module, package, note=""):
    """Import an optional module of a package. note: appended to the pip command.

    Raises ImportError with the pip command, or with the reason why the module does not load.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            message = f"{package} is not installed: pip install {package}{note}"
        else:
            message = f"{package} needs {error.name}: pip install {error.name}"
        raise ImportError(message) from error
    except (RuntimeError, OSError, AttributeError) as error:
        # the errors of a torchvision that was built for another torch
        raise ImportError(
            f"{package} does not load ({error}): reinstall torch and torchvision together"
        ) from error
