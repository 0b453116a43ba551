"""What `mu` can use and does not need: packages that a metric asks for when it is asked for."""

import importlib


def extra(module, package, note=""):
    """An optional module. note: what to know before it is installed.

    Raises ImportError that names the pip command, or says why a module that is there does not load."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise ImportError(
                f"this needs {package}, which is not installed: pip install {package}{note}"
            ) from error
        raise ImportError(
            f"{package} is there, and {error.name}, which it needs, is not: pip install {error.name}"
        ) from error
    except (
        RuntimeError,
        OSError,
        AttributeError,
    ) as error:  # a torchvision of another torch says so in these ways
        raise ImportError(
            f"{package} is there and does not load ({error}): torch and torchvision must be of one build, reinstall the two together"
        ) from error
