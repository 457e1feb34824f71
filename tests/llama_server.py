"""A program in place of llama-server: it asks for its key, answers /health and /tokenize, and what a test adds."""

import sys
from pathlib import Path

from common.llama_cpp.install import LlamaCpp

_PROGRAM = """#!{python}
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def send(self, value, status=200):
        self.send_response(status); self.end_headers(); self.wfile.write(json.dumps(value).encode())
    def do_GET(self): self.send({{"status": "ok"}})
    def do_POST(self):
        body, key = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), os.environ.get("LLAMA_API_KEY")
        if key and self.headers["Authorization"] != f"Bearer {{key.split(',')[0]}}":
            return self.send({{"error": {{"message": "Invalid API Key"}}}}, 401)
        if self.path == "/tokenize": return self.send({{"tokens": [ord(letter) for letter in body["content"]]}})
        self.answer(body)
{more}
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def llama_server(folder: Path, more: str = "") -> LlamaCpp:
    """A llama.cpp in `folder` with such a server; more: lines of its program, such as the Handler's `answer`."""
    path = folder / "llama-server"
    path.write_text(_PROGRAM.format(python=sys.executable, more=more))
    path.chmod(0o755)
    return LlamaCpp(folder, folder, path, "test", "1")
