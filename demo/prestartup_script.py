"""One line in the log in place of the red block that ComfyUI's own templates are missing.

``dev.py`` leaves them out of its environment on purpose: they are 100 MB of pictures.
"""

import logging


def shorten(record: logging.LogRecord) -> bool:
    """Turn the block into a note, and let every record pass."""
    if "comfyui-workflow-templates is not installed" in record.getMessage():
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg = "ComfyUI's own templates are left out: pip install comfyui-workflow-templates"
        record.args = ()
    return True


logging.getLogger().addFilter(shorten)
