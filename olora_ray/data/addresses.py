"""Addresses of source files: a path or URI to the filesystem and the path in it, and back.

A key of s3:// or gs:// is taken letter by letter, as `aws s3` and `gsutil` take it: '#', '%' and blanks are part of
it, and a '?' begins options. In file:// URIs '%20' is a blank, as everywhere.
"""

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote, unquote

from pyarrow import fs

from olora_ray.common import connections, patience, storage

Found = TypeVar("Found")


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a file and the path in it; connections are kept."""
    if not storage.is_uri(uri):
        return fs.LocalFileSystem(), uri
    scheme, bucket, key, query = _parts(uri)
    system, root = connections.connect(scheme, bucket, query)
    return system, root + (unquote(key) if scheme == "file" else key)


def asked(uri: str, request: Callable[[], Found]) -> Found:
    """What a request to the storage of a file returns; an object store that fails is asked again (patience.py)."""
    if not storage.is_uri(uri) or uri.startswith("file://"):
        return request()
    return patience.patiently("/".join(uri.partition("?")[0].split("/")[:3]), request)


def uri_beside(uri: str, path: str) -> str:
    """The URI of a path in the filesystem of `uri`; raises ValueError for a key that no URI can name."""
    scheme, bucket, _, query = _parts(uri)
    _, root = connections.connect(scheme, bucket, query)
    key = path.removeprefix(root)
    if scheme == "file":
        key = key.replace("%", "%25").replace("?", quote("?"))
    elif "?" in key:
        raise ValueError(f"the key {key[1:]!r} has a '?', which begins options in a URI; rename it")
    return f"{scheme}://{bucket}{key}{f'?{query}' if query else ''}"


def _parts(uri: str) -> tuple[str, str, str, str]:
    """Scheme, bucket, key with its leading slash, and query. `urlsplit` would end the key at '#'."""
    scheme, _, rest = uri.partition("://")
    place, _, query = rest.partition("?")
    bucket, slash, key = place.partition("/")
    return scheme, bucket, slash + key, query
