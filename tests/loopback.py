"""A server of files on this machine: a model hub for its client, and plain addresses; it can end early, or hold on."""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "5" * 40


class FileServer(ThreadingHTTPServer):
    """What it serves and how may be changed between requests.

    ``files``: bytes by path, as in ``/any/name.bin``; for the hub ``/OWNER/NAME/resolve/main/FILE``, under any commit.
    ``hashes``: by path, another hash to state than the file's.
    ``commits``: of the branch main: the present one, and each that follows when a file was got from the branch.
    ``cut``: by path, the bytes after which the connection is ended; each is used once.
    ``hold``: by path, the bytes after which nothing comes any more.
    ``ranges``: whether a part of a file can be asked for.
    ``log``: of all requests, (method, path, range).
    ``sent``: bytes of files that went out, by path.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hashes, self.commits = {}, [COMMIT]
        self.files, self.cut, self.hold, self.ranges, self.log, self.sent = {}, {}, {}, True, [], {}
        self.holding, self.ended = threading.Event(), threading.Event()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that are killed in the middle are what some tests are about


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        server, wanted = self.server, self.headers.get("Range")
        path = re.sub(r"/resolve/[^/]+/", "/resolve/main/", self.path)
        server.log.append((self.command, path, wanted))
        content = server.files.get(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if wanted and server.ranges and begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("ETag", f'"{server.hashes.get(path) or hub_hash(path, content)}"')
        revision = self.path.partition("/resolve/")[2].partition("/")[0]
        self.send_header("X-Repo-Commit", server.commits[0] if revision == "main" else revision)
        self.end_headers()
        if with_body:
            if revision == "main" and len(server.commits) > 1:
                server.commits.pop(0)
            self.send(path, content, begin)

    def send(self, path, content, begin):
        server = self.server
        end = server.cut.pop(path, server.hold.get(path, len(content)))
        server.sent[path] = server.sent.get(path, 0) + max(end - begin, 0)  # first: the client may be done before us
        self.wfile.write(content[begin:end])
        self.wfile.flush()
        if path in server.hold:
            server.holding.set()
            server.ended.wait(60)
        self.close_connection = True

    def log_message(self, *words):
        pass


def hub_hash(path, content):
    """What the hub calls a file: SHA-256 of a big one, git's hash of a small one such as config.json."""
    if path.endswith(".json"):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving():
    """A server at work."""
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
