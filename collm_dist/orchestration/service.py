"""Ranking service on Ray Serve: one model per device, concurrent requests scored in one pass."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.util.queue import Queue

from collm_dist.config import Config
from collm_dist.data.ingest.forgotten_users import is_tombstone
from collm_dist.errors import ArtifactError, CollmError, LaunchError, RequestError
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.event_actor import EventClient, EventWriter, start_event_actor
from collm_dist.orchestration.replica_plan import plan_replicas
from collm_dist.orchestration.service_metrics import ServiceMetrics
from collm_dist.phases import show_phase
from collm_dist.runs.run_dir import RunDir
from collm_dist.runs.stop_signals import handle_stop_signals
from collm_dist.serving.access import ACCESS_VARIABLE, check_token
from collm_dist.serving.batching import Batcher
from collm_dist.serving.event_parts import describe_columns
from collm_dist.serving.exploration import Compared, add_comparison, add_search
from collm_dist.serving.finished_run import build_recommender, check_settings, load_run_config
from collm_dist.serving.gateway import IMPORT_PATH, build_environment
from collm_dist.serving.http_app import Ranked, build_app
from collm_dist.serving.http_events import add_event_routes
from collm_dist.serving.http_schemas import HealthAnswer
from collm_dist.serving.recommender import Recommender
from collm_dist.serving.requests import RankingQuery
from collm_dist.serving.run_follower import RunFollower, ServedRun, read_model_id
from collm_dist.serving.service_options import ServiceOptions
from collm_dist.serving.web_page import add_page

APP_NAME = "collm-dist"
Answer = TypeVar("Answer")
# Requests and clients are not logged; internal errors are.
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}
# Ray Serve's default of 5 seconds is too short for its proxy to start on a busy machine.
_START_S = "60"
# Variable in which Serve looks for a function that returns middlewares of its proxies.
_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Wait for the end of Serve's controller, and between two looks at it.
_STOP_S, _POLL_S = 30.0, 0.1


@dataclass(frozen=True)
class RunPlan:
    """How a replica, whose working directory is another, finds the settings of a run.

    Attributes:
        config: settings of the run that the service was started with.
        run_dir: that run.
        overrides: settings of other runs, in place of those in their config.yaml.
        folder: working directory of the command, for relative paths.
        trust_code, accept_stage1: see ``load_recommender``.
    """

    config: Config
    run_dir: RunDir
    overrides: tuple[str, ...]
    folder: Path
    trust_code: bool
    accept_stage1: bool

    def read_config(self, run_dir: RunDir) -> Config:
        """Return the settings of a run, with an absolute path to a local backbone.

        Raises:
            ArtifactError, ConfigError: see ``load_recommender``.
        """
        config = self.config
        if run_dir != self.run_dir:
            config = load_run_config(run_dir.path / "config.yaml", [*self.overrides, f"run.dir={run_dir.path}"])
        permissions = {"trust_code": self.trust_code, "accept_stage1": self.accept_stage1}
        config = check_settings(config, run_dir, **permissions)
        backbone = self.folder / Path(config.llm.backbone).expanduser()
        if not backbone.exists():
            return config
        return config.model_copy(update={"llm": config.llm.model_copy(update={"backbone": str(backbone)})})


@serve.ingress()
class _Ranker:
    """Replica: the model of a run on one device, behind HTTP."""

    def __init__(
        self, plan: RunPlan, pointer: Path | None, model: str, options: ServiceOptions, events: Any, errors: Queue
    ) -> None:
        run_dir = plan.run_dir

        def load(target: RunDir) -> Recommender:
            client = None if events is None else EventClient(events)
            config = plan.read_config(target)
            return build_recommender(config, target, events=client, reuse_bytes=options.reuse_bytes)

        self._metrics = ServiceMetrics()
        try:
            if pointer is None and read_model_id(run_dir) != model:
                raise ArtifactError(
                    f"{run_dir.path} has changed since the service was started; stop it and start it again"
                )
            self._follower = RunFollower(run_dir, load, pointer, options.follow_every_s, self._metrics.report_run)
        except CollmError as error:  # Serve reports the text of a traceback only
            errors.put(error.to_dict())
            raise
        self._options, self._events = options, events

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = self._options
        thread = ThreadPoolExecutor(max_workers=1)  # the model is not thread-safe
        batcher: Batcher[RankingQuery, Ranked] = Batcher(
            lambda queries: self._answer(lambda served: served.rank_many(queries)),
            max_size=options.max_batch_size,
            wait_s=options.batch_wait_ms / 1000,
            max_waiting=options.max_waiting,
            report=self._metrics.report_pass,
            thread=thread,
        )
        comparer: Batcher[RankingQuery, Compared] = Batcher(
            lambda queries: self._answer(lambda served: served.compare_many(queries)),
            max_size=1,
            wait_s=0,
            max_waiting=options.max_waiting,
            thread=thread,
        )
        recommender = self._follower.served.recommender
        examples = list_examples(recommender)
        app = build_app(batcher.submit, self._follower.describe, options, examples)
        add_event_routes(
            app,
            None if self._events is None else EventWriter(self._events),
            get_recommender=lambda: self._follower.served.recommender,
            every_event_is_a_like=recommender.config.dataset.feedback == "implicit",
            options=options,
            report=self._metrics.report_events,
        )
        add_search(app, lambda: self._follower.served.search)
        add_comparison(app, comparer.submit, options, examples)
        add_page(app)
        return app

    def describe(self) -> HealthAnswer:
        """Return the answer of ``/healthz``."""
        return self._follower.describe()

    def _answer(self, answer: Callable[[ServedRun], list[Answer]]) -> list[Answer]:
        """Return a pass's answers by the run that is served when it begins."""
        served = self._follower.served
        answers = answer(served)
        self._metrics.report_reuse(served.recommender.kept_contexts)
        return answers


def run_service(
    config: Config,
    run_dir: RunDir,
    options: ServiceOptions,
    *,
    pointer: Path | None = None,
    overrides: Sequence[str] = (),
    trust_code: bool = False,
    accept_stage1: bool = False,
) -> None:
    """Serve a finished run until SIGTERM or SIGINT; accepted requests are answered before it ends.

    Args:
        config: the experiment.
        run_dir: run directory; a link is resolved once, at the start.
        options: address and limits.
        pointer: link to the run that is served, and from then on to whichever run it leads to.
        overrides: ``section.key=value`` settings for the runs that the link leads to.
        trust_code, accept_stage1: see ``load_recommender``.

    Raises:
        ArtifactError: the run is unfinished, inconsistent or damaged; the port was not opened.
        LaunchError: the port is in use, devices are missing, Ray does not start, or Serve already runs on the cluster.
        RequestError: the address is not a loopback address and there is no token, the token is too short, or the folder
            of events lies in the run.
        KeyboardInterrupt: it was stopped twice, or before the models started.
    """
    run_dir = RunDir(run_dir.path.resolve())
    pointer = None if pointer is None else pointer.absolute()
    plan = RunPlan(config, run_dir, tuple(overrides), Path.cwd(), trust_code, accept_stage1)
    plan.read_config(run_dir)
    model = read_model_id(run_dir)
    if options.events is not None and Path(options.events).resolve().is_relative_to(run_dir.path):
        raise RequestError(
            f"--events {options.events}: is inside the run directory, but events must outlive the run; choose "
            "another folder"
        )
    port = find_port(options.host, options.port)
    token = os.environ.get(ACCESS_VARIABLE)
    check_token(options.host, token)
    owns_ray = not ray.is_initialized() and not (config.cluster.ray_address or os.environ.get("RAY_ADDRESS"))
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", _START_S)
    with connect_ray(config.cluster), handle_stop_signals(_interrupt), _serving(port, options, token, owns_ray):
        replicas, devices = plan_replicas(options.replicas)
        events = None if options.events is None else _start_events(config, options)
        try:
            with show_phase("loading the model"):
                health = _start_replicas(plan, pointer, model, options, events, replicas, devices)
            _say(_describe_start(health, replicas, f"http://{_spell_host(options.host)}:{port}", pointer))
            threading.Event().wait()
        except KeyboardInterrupt:
            # Also raised between the first answer and the moment when Serve reports that it is ready.
            _say("stopping: new requests are refused, accepted ones are answered")
            _drain(options.shutdown_timeout_s)


def _describe_start(health: HealthAnswer, replicas: int, url: str, pointer: Path | None) -> str:
    metrics = sorted({node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]})
    line = (
        f"serving {health.run} ({health.stage} {health.model}) with {replicas} model(s) at {url} - open it in a "
        f"browser; POST /rank, GET /healthz, /docs; metrics for Prometheus at port {', '.join(map(str, metrics))}, "
        "/metrics. Ctrl-C or SIGTERM stops it"
    )
    if pointer is not None:
        line += f". It follows {pointer}"
    if health.refused is not None:
        line += f", whose run {health.refused.run} cannot be served: {health.refused.reason}"
    return line


def list_examples(recommender: Recommender) -> list[dict[str, Any]]:
    """Return example request bodies for the OpenAPI page."""
    history, candidates = recommender.item_ids[:3], recommender.item_ids[3:8] or recommender.item_ids
    examples: list[dict[str, Any]] = [{"history": history, "candidates": candidates, "top_k": 3}]
    known = next((user for user in recommender.user_ids if not is_tombstone(user)), None)
    if recommender.has_cf and known is not None:
        examples.append({"user": known, "num_retrieved": 50, "top_k": 10})
    return examples


def find_port(host: str, port: int) -> int:
    """Return the port to listen on, a free port for 0.

    Raises:
        LaunchError: the port is in use, or the address is not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise LaunchError(
            f"--host {host} --port {port}: cannot listen there ({_explain(error)}); stop the process that "
            "listens there, or set another port"
        ) from None


@contextmanager
def _serving(port: int, options: ServiceOptions, token: str | None, owns_ray: bool) -> Iterator[None]:
    """Run Serve for the duration of the block. A Ray of our own ends with all its processes; it needs no shutdown.

    Raises:
        LaunchError: Serve does not start, or already runs on the cluster.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise LaunchError("Ray Serve already runs on this cluster, with its own port; stop it there: serve shutdown")
    # Serve's own time limit is set for each request, by the gateway.
    http = {"host": options.host, "port": port}
    gateway = {"runtime_env": {"env_vars": {_CALLBACK: IMPORT_PATH, **build_environment(options, token)}}}
    try:
        try:
            with show_phase("starting Ray Serve"):
                serve.start(http_options=http, logging_config=_QUIET, controller_options=gateway)
        except (RuntimeError, TimeoutError, RayError) as error:
            reason = str(error).splitlines()[0]
            raise LaunchError(f"Ray Serve does not start ({reason}); if the machine is busy, try again later") from None
        yield
    finally:
        if not owns_ray:
            _stop_serve()


def _drain(limit_s: float) -> None:
    """Stop the replicas once they have answered what they accepted. A shutdown alone would end the proxies first.

    Serve also waits for replicas that are still loading; if none is ready, there is nothing to wait for.
    """
    applications = serve.status().applications.values()
    deployments = [deployment for state in applications for deployment in state.deployments.values()]
    if not any(state.replica_states.get("RUNNING") for state in deployments):
        return
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(TimeoutError):  # Serve's own, after 60 seconds
            serve.delete(APP_NAME)
            return


def _stop_serve() -> None:
    """End Serve.

    ``serve.shutdown`` alone waits for an answer of the controller, which ends itself without one; Ray reports that on
    every stop as a failed task. So the controller is asked to end without an answer, and then awaited.
    """
    with suppress(ValueError, RayError):  # it has ended
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_STOP_S)
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(_POLL_S)
    serve.shutdown()


def _start_events(config: Config, options: ServiceOptions) -> Any:
    """Start the owner of the store of events, in the columns of the run's log."""
    return start_event_actor(
        Path(options.events or ""),
        describe_columns(config.dataset),
        part_minutes=options.part_minutes,
        part_rows=options.part_rows,
        keep_days=options.keep_days,
    )


def _start_replicas(
    plan: RunPlan,
    pointer: Path | None,
    model: str,
    options: ServiceOptions,
    events: Any,
    replicas: int,
    devices: dict[str, int],
) -> HealthAnswer:
    """Start the replicas, wait until they have loaded their models, and return the state of one of them.

    A replica that follows a link may serve another run than the one that the link leads to.

    Raises:
        CollmError: error of a replica.
        LaunchError: a replica does not start.
    """
    errors = Queue(actor_options={"num_cpus": 0})
    # Room beyond the waiting and the scored requests for those being read or refused, and for /healthz.
    ongoing = options.max_waiting + options.max_batch_size + 100
    deployment = serve.deployment(
        _Ranker,
        name="ranker",
        num_replicas=replicas,
        ray_actor_options=devices,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        backpressure_config={"retry_after_s": 1},
        graceful_shutdown_timeout_s=options.shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_QUIET,
        max_constructor_retry_count=1,
    )
    try:
        handle = serve.run(deployment.bind(plan, pointer, model, options, events, errors), name=APP_NAME)
        health: HealthAnswer = handle.describe.remote().result()
    except (RuntimeError, RayError) as error:
        applications = serve.status().applications.values()
        messages = [state.message for application in applications for state in application.deployments.values()]
        if not errors.empty():
            raise CollmError.from_dict(errors.get()) from None
        raise LaunchError(
            "the process that serves the model does not start: " + "\n".join([*messages, str(error)])
        ) from None
    return health


def _explain(error: OSError) -> str:
    # ``create_server`` adds the address to the text, and name resolution has no system error number.
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # the reader of the output may have closed it
        print(text, flush=True)


def _spell_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt
