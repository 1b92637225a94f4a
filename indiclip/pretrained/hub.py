"""Files of the Hugging Face hub, for a name that asks for them: `hf-hub:OWNER/NAME`."""

from collections.abc import Sequence
from errno import ENOSPC
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

HUB = "hf-hub:"
# Configurations, tokenizers and tensors; nothing that runs, and no pickles.
_PLAIN = ("*.json", "*.txt", "*.model", "*.safetensors", "*.safetensors.index.json")


def hub_folder(repository: str, origin: str, patterns: Sequence[str] = _PLAIN) -> Path:
    """A repository's files, downloaded into the hub's local cache unless they are there.

    Args:
        repository: `OWNER/NAME`.
        origin: As the user wrote it, for messages.
        patterns: Of the files' names.

    Raises:
        FileNotFoundError: No network, or no such repository; says which files to bring and where.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise
        said = next(iter(str(error).splitlines()), "")
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}: {said}"
        raise FileNotFoundError(
            f"{origin}: cannot download {repository} ({reason}); where there is a network, run `hf download "
            f"{repository} --local-dir FOLDER` (it needs {', '.join(patterns)}), bring FOLDER here and name it instead"
        ) from error
