"""Whether servers that a scorer asks can be reached, before a run finds out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import urlsplit

from rayalign.schema import Config
from rayalign.scorers.connection import Connection
from rayalign.scorers.mix import parts_of
from rayalign.scorers.remote import LOCAL

PATIENCE_S = 3.0  # for a connection; nothing is waited for behind it


def notes_of_servers(config: Config) -> Iterator[str]:
    """One for each address where nobody is. No key is sent, and no question: what is there may answer as it likes."""
    for place, scorer in parts_of(config.scorer) if config.scored else ():
        for where, asked in ((place, scorer), (f"{place}.ask", getattr(scorer, "ask", None))):
            if isinstance(asked, Connection) and (why := _absent(asked.url, PATIENCE_S)):
                yield (
                    f"{where}.url={asked.url} cannot be reached from this machine ({why}): start the server before the "
                    "run, or correct the url; where scorers run on other machines, try it there"
                )


@lru_cache(maxsize=32)  # stages of one job ask the same server
def _absent(url: str, patience_s: float) -> str:
    """Why nobody is there; empty where somebody is."""
    import httpx

    try:
        with httpx.Client(timeout=patience_s, trust_env=urlsplit(url).hostname not in LOCAL) as client:
            client.head(url)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160].removesuffix(": ")
    except httpx.HTTPError:  # it is there, and slow, or speaks otherwise
        pass
    return ""
