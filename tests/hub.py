"A stand-in for the Hugging Face Hub on this machine, as far as `snapshot_download` asks"

import contextlib
import hashlib
import http.server
import json
import threading
from pathlib import Path

COMMIT = "a" * 40


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    root: Path  # `user/model` folders

    def answer(self, content=b"", status=200, **head):
        self.send_response(status)
        for name, value in dict(head, Content_Length=str(len(content))).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        api, parts = self.path.startswith("/api/models/"), self.path.partition("?")[0].removeprefix("/api/models")
        user, model, what, *rest = parts.strip("/").split("/")
        folder = self.root / user / model
        if not folder.is_dir():
            return self.answer(status=404, X_Error_Code="RepoNotFound")
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        if api and what == "revision":
            about = dict(id=f"{user}/{model}", sha=COMMIT, siblings=[dict(rfilename=name) for name in files])
            return self.answer(json.dumps(about).encode(), Content_Type="application/json")
        if api and what == "tree":
            tree = [dict(type="file", path=k, size=len(v), oid=blob(v)) for k, v in files.items()]
            return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        content = files[rest[-1]]
        return self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{blob(content)}"')

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(root):
    "Yields the address of a Hub whose repositories are the folders `root/user/model`"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Local", (Hub,), dict(root=Path(root))))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
