"""The models that a worker serves, over reloads: new ones of the config, old ones of live jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dicom_xai.config import Config, load
from dicom_xai.errors import StudyError
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device, resolve_device
from dicom_xai.service.modelfiles import ModelFiles, load_models
from dicom_xai.service.role import Context
from dicom_xai.service.warmup import warm_up
from dicom_xai.study import Job
from dicom_xai.telemetry import Event

T = TypeVar("T")

#: The model files are looked at so often.
FILES_EVERY_S = 30.0


class LiveModels:
    """Every model that a job may name now, on one device.

    Parameters
    ----------
    context : Context
        Its config is the first one.
    """

    def __init__(self, context: Context) -> None:
        self.config = context.config  #: the one whose models are loaded
        self._context = context
        self.device = Device("cpu")
        self._models: Mapping[str, ServedModel] = {}  # by card digest
        self._loading = threading.Lock()
        self._files = ModelFiles()
        self._files_seen_at = 0.0
        self._told_of: set[str] = set()
        self._tried: set[str] = set()  # digests of cards whose methods were tried

    def load(self, device: str) -> None:
        """Load, test and warm up the config's models on a device, a word of `devices`.

        Raises
        ------
        ConfigError
            A model, an explainer's name or the device; nothing is half loaded.
        """
        self.device = resolve_device(device)
        self._models = _aside(self._warm_models)
        self._report()
        self._tell_of_methods()

    def use(self, config: Config) -> None:
        """Load what is new; keep old models while jobs still name them. Errors as `load`."""
        with self._loading:
            if config.digest == self.config.digest:
                return
            loaded = _aside(lambda: load_models(config, self.device))
            live = self._context.ledger.jobs.live_model_digests()
            kept = {digest: model for digest, model in self._models.items() if digest in live}
            self._models = {**kept, **loaded}
            self.config = config
        self._report()
        self._tell_of_methods()

    def get(self, digest: str) -> ServedModel | None:
        """The model of a card, if it is loaded."""
        return self._models.get(digest)

    def of(self, job: Job) -> ServedModel:
        """The model the job was made for; else, after a restart, the live one of the same name.

        A receiver may have read a new config before we did: then it is read here and now.

        Raises
        ------
        StudyError
            There is neither.
        ConfigError
            The new config, or one of its models, cannot be used.
        """
        model = self.get(job.model_digest)
        if model is None:
            config, _ = load(self.config.path)
            if config.digest != self.config.digest:
                self.use(config)
                model = self.get(job.model_digest)
        if model is not None:
            return model
        card = self.config.cards.get(job.model)
        model = self.get(card.digest) if card is not None else None
        if model is None:
            raise StudyError(f"model {job.model!r} is not loaded any more")
        self._context.ledger.jobs.use_model(job, model.card.digest)
        return model

    def look_at_files(self) -> None:
        """Tell of model files that are not what was loaded; looks every `FILES_EVERY_S`."""
        now = self._context.ledger.now()
        if now - self._files_seen_at <= FILES_EVERY_S:
            return
        self._files_seen_at = now
        cards = [model.card for model in self._models.values()]
        for name, is_changed in self._files.changed(cards).items():
            self._context.metrics.model_file_changed.labels(name).set(is_changed)
            if is_changed and name not in self._told_of:
                self._context.log.error(Event.MODEL_FILE_CHANGED, model=name)
            (self._told_of.add if is_changed else self._told_of.discard)(name)

    def _warm_models(self) -> Mapping[str, ServedModel]:
        models = load_models(self.config, self.device)
        for model in models.values():
            for explainer in model.self_tests:
                warm_up(model, explainer)
        return models

    def _report(self) -> None:
        metrics = self._context.metrics
        for model in self._models.values():
            card = model.card
            metrics.device.labels(card.name, self.device.name, model.provider).set(1)
            metrics.model_cost_seconds.labels(card.name).set(
                max(model.costs.seconds(name, 1) for name in model.costs.runs_s)
            )
            for explainer, test in model.self_tests.items():
                self._context.log.info(
                    Event.MODEL_LOADED,
                    model=card.name,
                    version=card.version,
                    device=self.device.name,
                    explainer=explainer,
                    layer=model.graph(explainer).layer,
                    backward=dict(test.backward_nodes),
                    difference=test.largest_difference,
                    gradient_error=model.gradient_error,
                    reason=model.no_gradient,
                )

    def _tell_of_methods(self) -> None:
        """Say once of each model which methods do not apply to it, and why.

        Before the role is ready, or after `check` has found it out for a reload: beside a job it
        would take the interpreter's time from it.
        """
        for digest, model in self._models.items():
            if digest in self._tried:
                continue
            self._tried.add(digest)
            try:
                reasons = model.inapplicable_methods()
            except Exception as error:  # what is only told must not end what works
                self._context.log.exception(Event.METHODS_TRIED, error, model=model.card.name)
            else:
                self._context.log.info(
                    Event.METHODS_TRIED, model=model.card.name, does_not_apply=reasons
                )


def _aside(make: Callable[[], T]) -> T:
    """Run it in a thread that ends with it, and with the threads that OpenMP gave it for torch.

    OpenMP keeps some for each thread that ever computed. Where all together are more than the cores
    they sleep between operations, and to wake them takes longer than a small operation does.
    """
    with ThreadPoolExecutor(1, "loading") as thread:
        return thread.submit(make).result()
