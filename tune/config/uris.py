"""URIs of stores: the one that a study records in, and how to strip credentials from a URI."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

SECRET = re.compile("pass|pwd|token|secret|sig|key|cred|auth", re.IGNORECASE)


def strip_credentials(uri: str) -> str:
    """A URI without user, password, and parameters that look like secrets: safe to store and to show.

    A password may hold `/`, `@`, `?` or `#`, although a URI must quote them.
    """
    match = re.fullmatch(r"([A-Za-z][\w+.-]*)://(.*)", uri, re.DOTALL)
    if not match:
        return uri
    scheme, rest = match.groups()
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    # Only in http is `name:digits/` a host and its port; SQLAlchemy reads a user and a password.
    has_port = re.fullmatch(r"([^:]*|\[.*\]):\d*", authority) and scheme.lower() in ("http", "https")
    if "@" in authority or (":" in authority and not has_port and "@" in rest):
        # An `@` in well-formed parameters does not belong to the password.
        end = re.search(r"(\?[\w.%-]+=[^?#]*)?(#.*)?$", rest, re.DOTALL).start() if "@" in authority else len(rest)  # type: ignore[union-attr]
        rest = rest[:end].rpartition("@")[2] + rest[end:]
    path, query = re.fullmatch(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    kept = "".join(mark + piece for mark, piece in re.findall(r"([?#&;])([^?#&;]*)", query) if not holds_secret(piece))
    return f"{scheme}://{path}{re.sub('^[&;]', '?', kept)}"


def holds_secret(parameter: str) -> bool:
    """Whether a parameter of a URI (NAME=VALUE) looks like a secret, or holds a URI or parameters with one."""
    name, _, value = urllib.parse.unquote_plus(urllib.parse.unquote_plus(parameter)).partition("=")
    nested = any(SECRET.search(inner) for inner in re.findall(r"(\w+)\s*=", value))
    return bool(SECRET.search(name)) or nested or strip_credentials(value) != value


def scrub(text: str) -> str:
    """A text without the credentials of the URIs in it, whole ones or only their paths and parameters."""
    text = re.sub(r"[A-Za-z][\w+.-]*://\S+", lambda match: strip_credentials(match[0]), text)
    # Libraries also name a URI without its host, as `/path?token=...`.
    return re.sub(r"[?#&;][^\s?#&;=]+=[^\s?#&;]*", lambda match: "" if holds_secret(match[0][1:]) else match[0], text)


def tracking_uri(option: str = "") -> str:
    """The MLflow store's URI, without credentials and with an absolute path.

    It is --mlflow-uri, else MLFLOW_TRACKING_URI, else the sqlite file in the working folder, which `mlflow ui` shows.
    """
    uri = option or os.environ.get("MLFLOW_TRACKING_URI", "")
    return strip_credentials(absolute(uri)) if uri else default_uri()


def default_uri() -> str:
    """The URI of mlflow.db in the working folder."""
    path = str(Path("mlflow.db").resolve())
    if not set("?#%") & set(path):
        return f"sqlite:///{path}"
    import sqlalchemy

    # The URI names the driver: for `sqlite:///` MLflow would also make a folder of the quoted name.
    return sqlalchemy.URL.create("sqlite+pysqlite", database=path).render_as_string(hide_password=False)


def absolute(uri: str) -> str:
    """A local store's URI with an absolute path; other URIs are returned unchanged."""
    if match := re.fullmatch(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:)([^?]+)(.*)", uri):
        return f"{match[1]}{Path(match[2]).resolve()}{match[3]}"
    # A name without a scheme is a folder, except for these of MLflow.
    return uri if re.match(r"[A-Za-z][\w+.-]*:|databricks(-uc)?$|uc$", uri) else str(Path(uri).resolve())


def with_credentials(uri: str) -> str:
    """A URI with the credentials of MLFLOW_TRACKING_URI, if that names the same store.

    A study's files hold no secret, so `--resume` and `sync` need it in the environment.
    """
    whole = os.environ.get("MLFLOW_TRACKING_URI", "")
    return absolute(whole) if whole and tracking_uri(whole) == uri else uri


def local_path(uri: str) -> Path | None:
    """The file or folder of a local MLflow store; None for a server and for any other database."""
    if re.match(r"sqlite(\+\w+)?:///", uri):
        import sqlalchemy

        database = sqlalchemy.make_url(uri).database
        return Path(database) if database and database != ":memory:" else None
    if uri.startswith("file:"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path))
    return None if re.match(r"[A-Za-z][\w+.-]*:|databricks(-uc)?$|uc$", uri) else Path(uri)


def is_own(uri: str, directory: Path) -> bool:
    """Whether a store is this user's own: that of MLFLOW_TRACKING_URI, the working folder's default, or a file beside
    the study."""
    if uri in (tracking_uri(), default_uri()):
        return True
    path = local_path(uri)
    return path is not None and path.resolve().is_relative_to(directory.resolve().parent)
