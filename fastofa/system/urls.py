"""Tell URLs from paths. Most commands take only paths, and would otherwise create a local folder such as `s3:`."""

import re

from fastofa.system.errors import BadInput

URL = re.compile(r"[a-z][a-z0-9+.-]*://.*", re.IGNORECASE | re.DOTALL)


def is_url(text: str) -> bool:
    return URL.fullmatch(text) is not None


def refuse_url(name: str, text: str, remedy: str = "mount it or copy the files") -> None:
    """Raises BadInput if the text is or ends with a URL; `name` is the flag it was given for, or "". The
    message ends with the remedy."""
    if url := URL.search(text):
        flag = f"{name}: " if name else ""
        raise BadInput(f"{flag}expected a path on this machine, got the URL {url[0]}; {remedy}")
