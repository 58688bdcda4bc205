"""A tracking server that goes away must not cost a training: a server of our own, so that it can be taken away."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from eq.core.logs import Logger
from eq.core.registry import EqError
from eq.training.tracking import TrackPlan, start_tracker


class Server:
    "As much of MLflow's REST interface as one run needs."

    def __init__(self, refuse: bool = False):
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, code: int, body: dict) -> None:
                raw = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                name = self.path.split("?")[0].rsplit("/", 1)[-1]
                outer.asked.append(name)
                if name == "get-by-name":
                    self.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"})
                else:
                    self.answer(200, {})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append(self.path.rsplit("/", 1)[-1])
                info = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "status": "RUNNING", "start_time": 1, "artifact_uri": "mlflow-artifacts:/1"}
                if refuse:
                    self.answer(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "no room"})
                else:
                    self.answer(200, {"experiment_id": "1", "run": {"info": info, "data": {}}, "run_info": info})

            def log_message(self, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")


def test_a_server_that_goes_away_costs_no_training(tmp_path, quick):
    import io

    server, log = Server(), Logger(stream=io.StringIO())
    epochs = []
    start = time.monotonic()
    with start_tracker("mlflow", TrackPlan("ct", "run", server.uri, {"lr": 0.1}), log) as tracker:
        for epoch in range(4):
            if epoch == 2:
                server.stop()
            tracker.log({"loss": 1.0 / (1 + epoch)}, epoch)
            epochs.append(epoch)
    assert epochs == [0, 1, 2, 3]
    assert server.asked.count("log-batch") >= 3  # tags and parameters, then two epochs
    assert len(log.warnings) == 3 and "training goes on" in log.warnings[0] and "was not told everything" in log.warnings[-1]
    assert time.monotonic() - start < 60  # starved machines included; MLflow's own default would wait for minutes


def test_a_server_that_refuses_is_an_error_at_the_start(tmp_path, quick):
    server = Server(refuse=True)
    try:
        with pytest.raises(EqError, match="does not take a run: .*no room"):
            start_tracker("mlflow", TrackPlan("ct", "run", server.uri))
    finally:
        server.stop()


def test_the_key_file_is_ignored_by_git_and_its_template_is_not():
    import subprocess
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    ignored = subprocess.run(["git", "check-ignore", "configs/wandb.json", "configs/wandb.template.json"], cwd=root, capture_output=True, text=True)
    assert ignored.stdout.split() == ["configs/wandb.json"]
    assert json.loads((root / "configs" / "wandb.template.json").read_text()) == {"api_key": ""}
