"""An object store on this machine: moto's server of S3, which can be away for a while."""

import socket
import threading
from contextlib import contextmanager

import pytest


class Store:
    """A server of S3 on the loopback interface. What is put there stays while it is away.

    ``away``: called with the method and the path of each request; where it answers true, the connection is broken off.
    ``refuses``, ``fails``: the same; the answer is 403, or 500.
    """

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.away = self.refuses = self.fails = lambda method, path: False
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def _answer(self, environ, start_response):
        if self.away(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response("503 Service Unavailable", [])
            return []
        if self.refuses(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            start_response("403 Forbidden", [("Content-Length", "0")])
            return []
        if self.fails(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        return self._app(environ, start_response)

    def stop(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def files(self):
        """Its file system, which looks anew each time."""
        import s3fs

        return s3fs.S3FileSystem(
            key="key", secret="secret", endpoint_url=f"http://127.0.0.1:{self.port}", use_listings_cache=False
        )

    def put(self, folder, place):
        """Upload all files of a folder; gives the address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.files.pipe_file(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{place}"

    def contents(self, address):
        """Bytes of all files below an address, by their path from it."""
        root = address.removeprefix("s3://")
        return {name.removeprefix(f"{root}/"): self.files.cat_file(name) for name in self.files.find(root)}


@contextmanager
def object_store(monkeypatch):
    """A store with a bucket ``bucket``, which everything that is started meanwhile finds by its environment."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    store = Store()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # the libraries' own tries wait for seconds
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        if store.files.exists("bucket"):  # moto has one memory for the whole process
            store.files.rm("bucket", recursive=True)
        store.files.mkdir("bucket")
        yield store
    finally:
        store.stop()
        s3fs.S3FileSystem.clear_instance_cache()
