"""A reward service for configs/online_dpo_url.yaml: `python configs/reward_service.py 9000`.

POST {"prompts": [text, …], "completions": [text, …], "columns": {…}} → {"scores": [number, …]}.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


class Scores(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [ANALYZER.polarity_scores(text)["compound"] for text in asked["completions"]]
        body = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
    print(f"http://127.0.0.1:{port}/score", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Scores).serve_forever()
