"""An HTTP server on this machine, whole or broken, for tests of downloads."""
import http.server
import threading

import pytest


class Server(http.server.BaseHTTPRequestHandler):
    body = b""
    cut = None     # after so many bytes the connection ends
    ranges = True  # whether a download can be continued
    pace = None    # "slow": little by little; "stalls": silent after the cut, connection open
    gate = None    # an Event that the second half waits for
    seen = []      # the first byte that each request asked for

    def do_GET(self):
        begin = 0
        if self.ranges:
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        Server.seen.append(begin)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.body) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(self.body)
        if Server.cut:
            end = min(end, Server.cut)
        if Server.gate:
            self.wfile.write(self.body[begin:end // 2])
            self.wfile.flush()
            begin = end // 2
            Server.gate.wait(30)
        if Server.pace == "slow":
            for i in range(begin, end, 1000):
                self.wfile.write(self.body[i:min(i + 1000, end)])
                threading.Event().wait(0.02)
        else:
            self.wfile.write(self.body[begin:end])
        if Server.pace == "stalls" and end < len(self.body):
            self.wfile.flush()
            threading.Event().wait(1.5)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The URL of a file on a running server, which Server's attributes direct."""
    Server.seen = []
    Server.cut = None
    Server.ranges = True
    Server.pace = None
    Server.gate = None
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/x.pt"
    httpd.shutdown()
