"""Whatever a client does wrong, it gets the right status and a body of OpenAI's shape; nothing else leaks."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from pydantic import ValidationError

from slm.cli.main import main
from slm.errors import ConfigError, SlmError
from slm.serving.completions import _chat_logprobs
from slm.serving.keys import add_key, read_keys
from slm.serving.refusals import Refused, invalid_body, refuse
from slm.serving.running import bind, listen
from slm.serving.schema import ChatRequest
from slm.serving.settings import ServingSettings
from slm.serving.work import TokenChance
from tests.serving.conftest import fresh_model, serving
from tests.serving.stores import SUM

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": SUM}]


def post(address, path, content, **headers):
    headers = {"content-type": "application/json"} | headers
    return httpx2.post(address + path, content=content, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("path", "content", "status", "code", "message"),
    [
        (CHAT, b'{"messages": [', 400, "invalid_json", "the body is no valid JSON"),
        (CHAT, b"[]", 400, "invalid_body", "the body must be a JSON object"),
        (CHAT, b"{}", 400, "invalid_value", "messages: Field required"),
        (CHAT, b"\xff\xfe", 400, None, None),
        (CHAT, b"[" * 50_000, 400, None, None),
        (CHAT, b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, "invalid_value",
         "temperature: Input should be a finite number"),
        (CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400, "invalid_value", None),
        (CHAT, b'{"messages":[{"role":"user","content":"  "}]}', 400, "invalid_value", "messages is empty"),
        (CHAT, b'{"messages":[{"role":"user","content":"x"}],"seed":1e400}', 400, None, None),
        (CHAT, b'{"messages":[{"role":"user","content":"x"}],"max_tokens":100000}', 400, "invalid_value",
         "max_tokens must be in 1..1024, got 100000: lower it"),
        (CHAT, b'{"model":"tiny:nope","messages":[{"role":"user","content":"x"}]}', 404, "model_not_found",
         "model 'tiny:nope' does not exist"),
        ("/v1/completions", b'{"prompt":[]}', 400, "invalid_value", "prompt"),
        ("/v1/completions", b'{"prompt":"x","stop":""}', 400, "invalid_value", "must not be empty"),
        ("/v1/nothing", b"{}", 404, "not_found", "Not Found"),
        ("/v1/models", b"{}", 405, "method_not_allowed", "Method Not Allowed"),
        ("/v1/load_lora_adapter", b'{"lora_name":"x","lora_path":"/etc"}', 403, "adapters_are_off", None),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(address, path, content, status, code, message):
    answer = post(address, path, content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    assert message is None or message in error["message"]
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "place", "message"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "must be a text or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": ""}]}]}, "messages.0.content.0.type", "Input"),
        ({"messages": MESSAGES, "stop": list("abcde")}, "stop", "at most 4 items"),
        ({"messages": MESSAGES, "stop": ["a", 1]}, "stop.1", "valid string"),
        ({"messages": MESSAGES, "n": "x"}, "n", "valid integer"),
        ({"messages": MESSAGES, "tools": [1]}, None, "tools is not supported"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_without_names_of_types(body, place, message):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    refusal = invalid_body([m | {"loc": ("body", *m["loc"])} for m in caught.value.errors()])
    assert refusal.param == place
    assert refusal.message.startswith(f"{place}: " if place else message)
    assert message in refusal.message
    assert "[" not in refusal.message


def test_a_prompt_of_ten_megabytes_is_refused_however_its_length_is_told(address):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    told = post(address, CHAT, body)

    def chunks():
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    untold = post(address, CHAT, chunks())
    for answer in (told, untold):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_long"


def test_unknown_tasks_and_jobs_are_not_found(address):
    for path, code in (("/v1/tasks/nope", "task_not_found"), ("/v1/jobs/nope", "job_not_found")):
        answer = httpx2.get(address + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


def test_teaching_and_forgetting_are_off_unless_allowed(address):
    taught = httpx2.post(address + "/v1/tasks", data={"name": "x"}, files={"file": ("x.jsonl", b"{}")})
    forgotten = httpx2.delete(address + "/v1/tasks/sums")
    for answer in (taught, forgotten):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "teaching_is_off")


def test_a_client_is_told_what_it_may_ask_for(address, store, tiny_folder, tiny):
    # The window has room for one token of the prompt at least.
    told = httpx2.get(address + "/v1/limits").json()
    assert told == {"max_tokens": tiny.window - 1, "is_teaching": False}
    with serving(fresh_model(store, tiny_folder), max_tokens=8, is_teaching=True) as teaching:
        assert httpx2.get(teaching + "/v1/limits").json() == {"max_tokens": 8, "is_teaching": True}
        for wanted, status in ((8, 200), (9, 400)):
            body = json.dumps({"messages": MESSAGES, "max_tokens": wanted}).encode()
            assert post(teaching, CHAT, body).status_code == status


def test_other_web_pages_and_other_names_of_this_machine_are_refused(address):
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
    assert post(address, CHAT, body, origin="https://evil.example").json()["error"]["code"] == "wrong_origin"
    assert post(address, CHAT, body, origin=address).status_code == 200
    assert post(address, CHAT, body, host="evil.example").json()["error"]["code"] == "wrong_host"
    assert post(address, CHAT, body, origin="http://[").json()["error"]["code"] == "wrong_origin"
    assert post(address, CHAT, body, host="LOCALHOST:8000").status_code == 200
    assert "access-control-allow-origin" not in post(address, CHAT, body).headers


def test_a_web_page_of_an_allowed_origin_may_ask_and_no_other(store, tiny_folder):
    body, origin = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode(), "https://app.example"
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with serving(fresh_model(store, tiny_folder), origins=("https://App.example/",)) as address:
        allowed = httpx2.options(address + CHAT, headers=wish | {"origin": origin})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        answer = post(address, CHAT, body, origin=origin)
        assert answer.headers["access-control-allow-origin"] == origin
        assert "X-SLM-Mixture" in answer.headers["access-control-expose-headers"]
        other = {"origin": "https://evil.example"}
        assert (
            "access-control-allow-origin" not in httpx2.options(address + CHAT, headers=wish | other).headers
        )
        assert post(address, CHAT, body, **other).json()["error"]["code"] == "wrong_origin"
        too_long = post(address, CHAT, b"{" + b" " * ServingSettings().max_body_bytes, origin=origin)
        assert too_long.status_code == 413
        assert too_long.headers["access-control-allow-origin"] == origin


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_with_a_certificate_the_server_speaks_tls_alone(tmp_path, store, tiny_folder):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = (
        "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    made = ["openssl", *words.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
    settings = {"certificate": certificate, "certificate_key": key}
    with serving(fresh_model(store, tiny_folder), **settings) as address:
        trusting = ssl.create_default_context(cafile=certificate)
        headers = {"content-type": "application/json"}
        answer = httpx2.post(address + CHAT, content=body, headers=headers, verify=trusting, timeout=60)
        assert answer.status_code == 200
        with pytest.raises(httpx2.ConnectError, match=r"self-signed|self signed"):
            httpx2.get(address + "/health")
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(address.replace("https:", "http:") + "/health")


def test_keys_separate_asking_teaching_and_administration(tmp_path, store, tiny_folder):
    file = tmp_path / "keys.json"
    keys = {scope: add_key(file, scope, [scope]) for scope in ("ask", "teach", "admin")}
    assert not any(key in file.read_text() for key in keys.values())
    assert file.stat().st_mode & 0o077 == 0
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
    routes = {
        "ask": lambda a, h: post(a, CHAT, body, **h),
        "teach": lambda a, h: httpx2.get(a + "/v1/jobs", headers=h),
        "admin": lambda a, h: post(a, "/v1/unload_lora_adapter", b'{"lora_name": "x"}', **h),
    }
    with serving(fresh_model(store, tiny_folder), keys_file=file) as address:
        for scope, send in routes.items():
            for owner, key in keys.items():
                status = send(address, {"authorization": f"Bearer {key}"}).status_code
                expected = {"ask": 200, "teach": 200, "admin": 404}[scope] if owner == scope else 403
                assert status == expected, (scope, owner)
            for wrong in ({}, {"authorization": "Bearer slm-wrong"}, {"authorization": keys[scope]}):
                answer = send(address, wrong)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx2.get(address + "/v1/limits").status_code == 401
        assert httpx2.get(address + "/health").status_code == 200


def test_a_keys_file_that_cannot_be_written_leaves_no_debris(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fill)
    with pytest.raises(ConfigError, match=r"keys\.json cannot be written \(No space left on device\)"):
        add_key(tmp_path / "keys.json", "me", ["ask"])
    assert {path.name for path in tmp_path.iterdir()} <= {"keys.json.lock"}
    with pytest.raises(ConfigError, match="its folder does not exist"):
        add_key(tmp_path / "nowhere" / "keys.json", "me", ["ask"])
    assert not (tmp_path / "nowhere").exists()


def test_keys_made_at_the_same_time_are_all_kept(tmp_path):
    file = tmp_path / "keys.json"
    with ThreadPoolExecutor(6) as pool:
        keys = list(pool.map(lambda n: add_key(file, f"n{n}", ["ask"]), range(6)))
    known = read_keys(file)
    assert {known.check(f"Bearer {key}", "ask") for key in keys} == {f"n{n}" for n in range(6)}


@pytest.mark.parametrize("scopes", ["[1]", '"ask"', "null"])
def test_scopes_that_are_no_texts_are_refused(tmp_path, scopes):
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [{{"name": "me", "scopes": {scopes}, "sha256": "x"}}]}}')
    with pytest.raises(ConfigError, match=r"is no keys file \(scopes must be a list of texts\)"):
        read_keys(file)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(monkeypatch, capsys):
    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("slm.cli.serve.open_model", load)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "store", "--port", str(port)]) == 1
    assert capsys.readouterr() == (
        "",
        f"slm: cannot listen at 127.0.0.1 port {port} (Address already in use): give another --port or "
        "--host, or stop what listens there\n",
    )


def test_of_two_servers_that_start_on_one_port_the_slower_is_refused():
    settings = ServingSettings(host="localhost", port=0)
    first = bind(settings)
    settings = ServingSettings(host="localhost", port=first[0].getsockname()[1])
    second = bind(settings)
    assert listen(first[:1], settings) == settings.port
    with pytest.raises(ConfigError, match="cannot listen at localhost port"):
        listen(second, settings)
    for taken in (*first, *second):
        taken.close()


def test_a_server_without_keys_listens_to_this_machine_alone():
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 can be reached from other machines"):
        ServingSettings(host="0.0.0.0")


def test_an_origin_names_one_web_page():
    assert ServingSettings(origins=("HTTPS://App.example/",)).origins == ("https://app.example",)
    for origin in ("*", "https://*.example"):
        with pytest.raises(ConfigError, match=r"an origin cannot be '\*'"):
            ServingSettings(origins=(origin,))


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_starts(tmp_path):
    file = tmp_path / "certificate.pem"
    with pytest.raises(ConfigError, match="go together"):
        ServingSettings(certificate=file)
    with pytest.raises(ConfigError, match=r"certificate\.pem does not exist"):
        ServingSettings(certificate=file, certificate_key=file)
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match="are no certificate and its key"):
        ServingSettings(certificate=file, certificate_key=file)


def test_slow_clients_are_let_go_while_others_are_answered(store, tiny_folder):
    settings = {"header_timeout_s": 0.6, "body_timeout_s": 0.6}
    with serving(fresh_model(store, tiny_folder), **settings) as address:
        host, port = address.removeprefix("http://").split(":")

        def trickle(head: bytes) -> bytes:
            with socket.create_connection((host, int(port)), timeout=20) as sock:
                sock.sendall(head)
                sock.settimeout(20)
                received = b""
                while chunk := sock.recv(4096):
                    received += chunk
                    if b"}}" in received:
                        break
                return received

        heads = {
            b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ": b"the headers took too long",
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{": b"the body took longer than 0.6 s",
        }
        found: dict[bytes, bytes] = {}
        threads = [threading.Thread(target=lambda h=head: found.__setitem__(h, trickle(h))) for head in heads]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
        assert post(address, CHAT, body).status_code == 200
        for thread in threads:
            thread.join(20)
        for head, message in heads.items():
            assert b" 408 " in found[head].split(b"\r\n")[0]
            assert message in found[head]
        assert time.monotonic() - begun < 15


def test_a_client_that_leaves_frees_its_row(store, tiny_folder):
    model = fresh_model(store, tiny_folder)
    with serving(model) as address:
        body = {"messages": MESSAGES, "max_tokens": 80, "stream": True, "n": 4, "temperature": 1.0}
        with httpx2.stream("POST", address + CHAT, json=body, timeout=60) as answer:
            next(answer.iter_lines())
        ends = time.monotonic() + 20
        while time.monotonic() < ends:
            page = httpx2.get(address + "/metrics").text
            if "\nslm_rows 0.0" in page:
                break
            time.sleep(0.05)
        assert "\nslm_rows 0.0" in page
        assert 'slm_tasks_retrieved_total{task="sums"}' not in page  # it was not answered


def test_what_is_no_meant_error_stays_in_the_log():
    hidden = refuse(ZeroDivisionError("/secret/path"))
    assert (hidden.status, hidden.code) == (500, "server_error")
    assert "secret" not in json.dumps(hidden.body)
    assert refuse(SlmError("x")).status == 500
    kept = Refused(418, "short and stout", "teapot")
    assert refuse(kept) is kept


def test_a_token_that_is_a_part_of_a_character_has_no_bytes():
    told = _chat_logprobs([TokenChance("\ufffd", -1.0, (("é", -1.0),))])["content"][0]
    assert told["bytes"] is None
    assert told["top_logprobs"][0]["bytes"] == [0xC3, 0xA9]


def test_the_first_text_of_a_stream_is_timed_once(store, tiny_folder):
    with serving(fresh_model(store, tiny_folder)) as address:
        body = {"prompt": [SUM, SUM], "max_tokens": 12, "stream": True, "n": 2}
        assert httpx2.post(f"{address}/v1/completions", json=body, timeout=60).text.count("data:") > 4
        assert "\nslm_first_token_seconds_count 1.0" in httpx2.get(f"{address}/metrics").text
