"""Many connections, and a queue that is full: each is answered, and the worker lives."""

import concurrent.futures
import contextlib
import os
import resource
import threading

import pytest
import requests
from patience import DEADLINE, wait_until
from refusing import GOOD, post, refused, wait_for_an_empty_house

pytestmark = pytest.mark.usefixtures("worker_lives")


def test_two_hundred_connections(server):
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        bad = GOOD | {"temperature": -1}
        codes = list(pool.map(lambda _: post(server, bad).status_code, range(200)))
    assert codes == [400] * 200


def test_one_connection_too_many_is_told_so(server, monkeypatch):
    wait_for_an_empty_house(server)
    full = threading.BoundedSemaphore(1)
    full.acquire()
    monkeypatch.setattr(server.httpd, "_room", full)
    response = requests.get(f"{server.url}/health", timeout=DEADLINE)
    refused(response, 503)
    assert response.headers["Retry-After"] == "5"


def test_a_thread_that_cannot_start_takes_no_room(server, monkeypatch):
    wait_for_an_empty_house(server)

    def none_left(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(requests.RequestException):
            requests.get(f"{server.url}/health", timeout=DEADLINE)
    wait_for_an_empty_house(server)
    assert requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200


def test_more_files_than_select_can_watch(server):
    """Connections get numbers beyond 1,023 then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this system lets a process have fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        with contextlib.ExitStack() as stack:
            while (last := stack.enter_context(open(os.devnull))).fileno() < 1100:
                pass
            assert post(server, GOOD).status_code == 200
            assert last.fileno() == 1100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_queue_that_is_full_says_when_to_come_back(server, monkeypatch):
    """One runs, one waits, and every further one is turned away until there is room again."""
    go_on = threading.Event()
    answer = server.worker._answer

    def held(*args) -> None:
        assert go_on.wait(DEADLINE)
        answer(*args)

    monkeypatch.setattr(server.worker, "max_queue", 1)
    monkeypatch.setattr(server.worker, "_answer", held)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            accepted = []
            for count in (1, 2):
                accepted.append(pool.submit(post, server, GOOD))
                assert wait_until(lambda count=count: server.worker.outstanding == count)
            for _ in range(5):
                full = post(server, GOOD)
                refused(full, 503)
                assert full.headers["Retry-After"] == "5"
        finally:
            go_on.set()
        assert [one.result().status_code for one in accepted] == [200, 200]
    assert post(server, GOOD).status_code == 200
