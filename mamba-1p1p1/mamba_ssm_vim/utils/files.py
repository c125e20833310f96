"""Checks of untrusted weight files that come before anything in them is read, and of the way to the hub."""

import socket
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

# The structure of a checkpoint, without the tensors' values: each tensor takes some 150 bytes. Torch reads about a
# million values a second.
_LARGEST_PICKLE = 4 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence fit for users."""


def check_archive(path: Path) -> None:
    """Refuse an archive that is damaged, or that would take far more memory than the file.

    Raises:
        CheckpointError: see above.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.external_attr & 0xFF for part in parts):
                # Torch leaves the memory of a part that is marked as a folder as it is.
                raise CheckpointError(f"{path} is damaged: its parts are marked as other than files; copy it again")
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            if not stored or sum(part.file_size for part in parts) > path.stat().st_size:
                raise CheckpointError(f"{path} is compressed, which torch.save never does: write it with torch.save")
            for part in parts:
                if part.filename.endswith("data.pkl") and part.file_size > _LARGEST_PICKLE:
                    raise CheckpointError(
                        f"{path} holds {part.file_size / 2**20:.0f} MiB of values beside its tensors, expected at most "
                        f"{_LARGEST_PICKLE // 2**20}: save its state_dict alone (torch.save(model.state_dict(), ...))"
                    )
            # All of them are 0 where torch.serialization.set_crc32_options(False) left checksums out.
            if any(part.CRC for part in parts) and (damaged := archive.testzip()):
                raise CheckpointError(
                    f"{path} is damaged: {damaged} does not match its checksum; copy the file again or use another one"
                )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive makes zipfile raise errors of many types
        raise CheckpointError(f"{path} is truncated or damaged: copy it again ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def has_address(url: str) -> bool:
    """Whether the name of a URL's host resolves: without that the hub's client retries for most of a minute, logging
    each attempt."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, 443)
    except OSError:
        return False
    return True
