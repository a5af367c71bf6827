"""MLflow's model registry, used so that any step may be interrupted and repeated.

A version is found again by fingerprint and digest before one is made; its bytes are fetched back and hashed before an
alias moves; aliases move under a lock, and only from the champion that the decision was about. So a promotion that is
cut anywhere ends, when repeated, with one version, one champion and one entry in the succession of champions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import artifact, fingerprint
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.fault_injection import fault_point
from pipelines.core.redaction import redact
from pipelines.registry import current, history, listing, package, registry_lock
from pipelines.registry import evidence as evidence_of
from pipelines.registry.current import CHAMPION, PROMOTED_BY
from pipelines.registry.evidence import EVIDENCE_TAG, OURS, Evidence
from pipelines.registry.package import MODEL_FOLDER
from pipelines.tracking.client import connect, experiment_id, reachable, upload
from pipelines.tracking.config import TrackingConfig, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
"""Alias of a candidate, as MLflow's documentation calls it."""
_LEASE_WAIT_S = 900.0
_PROMOTES = "ingot.promotes"
_KEY_DIGITS = 16
_UPLOADS_AT_ONCE = 8
"""A version is some twenty files, most of them small; nothing else waits for the server meanwhile."""
_RESTORE = (
    "no alias was moved; restore that version in the registry's storage, or delete the version in MLflow: a rollback "
    "then goes one champion further back, and a promotion registers the model anew"
)


class Registry:
    """One registered model.

    Args:
        client: connection to MLflow.
        uri: where it is.
        model: name of the registered model.
        store_root: root of the store, for the champions.
    """

    def __init__(self, client: MlflowClient, uri: str, model: str, store_root: Path) -> None:
        self._client = client
        self._uri = uri
        self.model = model
        self.store_root = store_root
        self._made: set[str] = set()
        """Versions that this connection made: none of them can be champion yet."""

    def champion(self) -> ModelVersion | None:
        """Return the version that the alias `champion` names, and note in the history when others moved it."""
        holder = self.by_alias(CHAMPION)
        known = history.champion(self.store_root, self.model)
        version = str(holder.version) if holder is not None else None
        if version != (known["version"] if known else None):
            tags = holder.tags if holder is not None else {}
            self._note(history.OBSERVED, version, current.moved_by(tags), tags)
        return holder

    def evidence(self, version: ModelVersion) -> Evidence | None:
        """Fetch what a registered version was judged by; None where there is nothing that can be verified.

        Raises:
            IntegrityError: it is not what was registered.
        """
        expected = version.tags.get(EVIDENCE_TAG)
        if expected is None:
            return None
        with self._downloaded(version, OURS) as folder:
            return evidence_of.load(folder, str(version.version), expected)

    def find(self, facts: Evidence) -> ModelVersion | None:
        """Return the registered version of this very model, or None."""
        wanted = f"name = '{self.model}' and tags.fingerprint = '{facts.fingerprint}'"
        versions = self._client.search_model_versions(wanted)
        return next((v for v in versions if v.tags.get("digest") == facts.digest), None)

    def register(
        self, facts: Evidence, build: Callable[[], Path], tags: Mapping[str, str], *, run_id: str, description: str
    ) -> ModelVersion:
        """Return the version of this model, making it only if there is none.

        Args:
            facts: the model.
            build: makes the folder to upload, where that is needed; see `package.build`.
            tags: facts to find and judge the version by.
            run_id: MLflow run that carries the files.
            description: shown in MLflow's interface.
        """
        if (known := self.find(facts)) is not None:
            return known
        folder = build()
        place = f"models/{facts.name}-{facts.fingerprint[:_KEY_DIGITS]}"
        files = {f"{place}/{file.relative_to(folder).as_posix()}": file for file in folder.rglob("*") if file.is_file()}
        artifact_uri = self._client.get_run(run_id).info.artifact_uri
        upload(self._client, artifact_uri, files, at_once=_UPLOADS_AT_ONCE)
        fault_point("promote.after_upload")
        version = self._create(f"{artifact_uri}/{place}", run_id=run_id, tags=dict(tags), description=description)
        self._made.add(str(version.version))
        fault_point("promote.after_version")
        return version

    def verify(self, version: ModelVersion, hashes: Mapping[str, str]) -> None:
        """Fetch the model files of a version that was just registered back, and hash them.

        Args:
            version: the registered version.
            hashes: file name -> sha256 that the artifact's manifest has.

        Raises:
            IntegrityError: naming the file and both hashes; the version, if it is not champion, is removed.
        """
        with self._downloaded(version, MODEL_FOLDER) as folder:
            fault_point("promote.after_fetch", path=folder / "model.safetensors")
            try:
                self._compare(version, folder, hashes)
            except IntegrityError:
                if CHAMPION not in self._aliases(version):
                    self._client.delete_model_version(self.model, version.version)
                raise
        self._client.set_model_version_tag(self.model, version.version, "validation_status", "approved")

    @contextlib.contextmanager
    def verified(self, version: ModelVersion) -> Iterator[Path]:
        """Download a whole version for the length of the block, its bytes checked if Ingot registered it.

        The files must be those of its manifest, and the manifest that of the digest in the registry's database.

        Raises:
            IntegrityError: naming what differs.
        """
        with self._downloaded(version, "") as folder:
            if (digest := version.tags.get("digest")) is not None:
                manifest = artifact.load(folder / OURS).manifest
                if manifest.digest != digest:
                    raise IntegrityError(
                        f"version {version.version} of {self.model}: its manifest has the digest {manifest.digest}, "
                        f"its tag says {digest}",
                        hint=_RESTORE,
                    )
                self._compare(version, folder / MODEL_FOLDER, package.hashes_of(manifest))
            yield folder

    def _compare(self, version: ModelVersion, folder: Path, hashes: Mapping[str, str]) -> None:
        returned = {
            f"{MODEL_FOLDER}/{path.relative_to(folder).as_posix()}": fingerprint.hash_file(path)
            for path in folder.rglob("*")
            if path.is_file()
        }
        wrong = sorted(n for n in hashes.keys() | returned.keys() if hashes.get(n) != returned.get(n))
        if wrong:
            name = wrong[0]
            raise IntegrityError(
                f"version {version.version} of {self.model}: {name} came back from the registry as "
                f"{returned.get(name, '(missing)')}, expected sha256 {hashes.get(name, '(no such file)')}",
                hint=_RESTORE,
            )

    def promote(self, version: ModelVersion, why: str, facts: Mapping[str, Any], *, over: ModelVersion | None) -> bool:
        """Make a verified version the champion, and write it into the history once.

        Args:
            version: the new champion.
            why: the rule that decided.
            facts: more for the history.
            over: the champion that it was judged against.

        Returns:
            False, with nothing changed, when another champion has taken over since: judge again.
        """
        number = str(version.version)
        fault_point("promote.before_alias")
        holders = self._holders()
        holder = holders.get(CHAMPION)
        if holder not in {str(over.version) if over is not None else None, number}:
            return False
        promoter: dict[str, str] = {}
        if holder != number:
            promoter = self._tag_promoter(number, why)
            self._client.set_registered_model_alias(self.model, CHAMPION, number)
        fault_point("promote.after_alias")
        if holders.get(CHALLENGER) == number:
            self._client.delete_registered_model_alias(self.model, CHALLENGER)
        known = history.champion(self.store_root, self.model)
        if known is None or known["version"] != number or known["action"] == history.OBSERVED:
            self._note(history.PROMOTE, number, why, version.tags, previous=holder, **promoter, **facts)
        return True

    def note_registered(self, version: ModelVersion) -> None:
        """Write a version that did not become champion into the history, once."""
        number = str(version.version)
        if all(record["version"] != number for record in history.read(self.store_root, self.model)):
            self._note(history.REGISTERED, number, "variant within budget", version.tags)

    def mark_candidate(self, version: ModelVersion) -> None:
        """Give a version the alias `challenger`: a candidate, registered and under examination, not champion."""
        if str(version.version) in self._made or CHAMPION not in self._aliases(version):
            self._client.set_registered_model_alias(self.model, CHALLENGER, str(version.version))

    def release(self, alias: str, number: str) -> None:
        """Take an alias from a version, if it has it."""
        if self._holders().get(alias) == number:
            self._client.delete_registered_model_alias(self.model, alias)

    def rollback(self, why: str) -> history.Record:
        """Give the title back to the champion before the present one, whose bytes are verified first.

        Versions that were deleted since are passed over.

        Raises:
            ConfigError: there was none before.
            IntegrityError: the registry no longer holds its bytes; nothing was changed.
        """
        current = self.champion()
        before = str(current.version) if current is not None else None
        version = self._earlier(before)
        if version is None:
            raise ConfigError(
                f"{self.model} has no earlier champion to go back to", hint="`ingot list models` shows its versions"
            )
        with self.verified(version):
            number = str(version.version)
        why = why or (f"rollback from version {before}" if before else "rollback: the alias named no version")
        promoter = self._tag_promoter(number, why)
        self._client.set_registered_model_alias(self.model, CHAMPION, number)
        return self._note(history.ROLLBACK, number, why, version.tags, previous=before, **promoter)

    def _earlier(self, current: str | None) -> ModelVersion | None:
        """Return the newest earlier champion that the registry still has; None for none."""
        for record in reversed(history.champions(self.store_root, self.model)):
            number = record["version"]
            if number in {None, current}:
                continue
            version = self.version(number)
            # A database that was set up anew counts its versions from 1 again.
            if version is not None and version.tags.get("fingerprint") == record.get("fingerprint"):
                return version
        return None

    def version(self, number: str) -> ModelVersion | None:
        """Return a version by its number, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version(self.model, number)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def run_for(self, facts: Evidence, config: TrackingConfig) -> str:
        """Return the MLflow run that carries a model's files when tracking names none."""
        experiment = experiment_id(self._client, config, self.store_root)
        wanted = f"tags.`{_PROMOTES}` = '{facts.fingerprint}'"
        if runs := self._client.search_runs([experiment], filter_string=wanted, max_results=1):
            return str(runs[0].info.run_id)
        tags = {_PROMOTES: facts.fingerprint, "ingot.node": "promote"}
        created = self._client.create_run(experiment, run_name=f"promote {self.model}", tags=tags).info.run_id
        self._client.set_terminated(created)
        return str(created)

    @contextlib.contextmanager
    def _downloaded(self, version: ModelVersion, part: str) -> Iterator[Path]:
        with contextlib.ExitStack() as downloads:
            try:
                folder = downloads.enter_context(
                    package.downloaded(self._client, self._uri, version, part, self.store_root)
                )
            except FileNotFoundError as error:
                raise IntegrityError(f"version {version.version} of {self.model}: {error}", hint=_RESTORE) from error
            yield folder

    def _tag_promoter(self, number: str, why: str) -> dict[str, str]:
        """Tag a version with who gives it the title, when and why: other stores see the registry, not our history."""
        promoter = history.who_and_when()
        text = json.dumps(promoter | {"why": redact(why)}, sort_keys=True)
        self._client.set_model_version_tag(self.model, number, PROMOTED_BY, text)
        return promoter

    def by_alias(self, alias: str) -> ModelVersion | None:
        """Return the version that an alias names, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version_by_alias(self.model, alias)
        except MlflowException as error:
            # INVALID_PARAMETER_VALUE is MLflow's word for "no such alias".
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None
            raise

    def _aliases(self, version: ModelVersion) -> list[str]:
        return [alias for alias, number in self._holders().items() if number == str(version.version)]

    def _holders(self) -> dict[str, str]:
        """Return alias -> number of the version that it names; one request, where MLflow's own look-up makes two."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(self.model).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
        return {alias: str(number) for alias, number in aliases.items()}

    def _create(self, place: str, **facts: Any) -> ModelVersion:
        """Make a version; the registered model too, if this is its first."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.create_model_version(self.model, place, **facts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        with contextlib.suppress(MlflowException):  # somebody else was first; what is wrong else, the next line says
            self._client.create_registered_model(self.model)
        return self._client.create_model_version(self.model, place, **facts)

    def _note(
        self, action: str, version: str | None, why: str, tags: Mapping[str, str], **facts: Any
    ) -> history.Record:
        about: dict[str, Any] = {name: tags[name] for name in history.NOTED if name in tags}
        if "bits_per_byte" in tags:
            about["bits_per_byte"] = float(tags["bits_per_byte"])
        if redact(self._uri) == self._uri:
            about["tracking_uri"] = self._uri
        return history.append(self.store_root, self.model, action, version=version, why=why, **about, **facts)


@contextlib.contextmanager
def opened(config: TrackingConfig, store_root: Path, model: str) -> Iterator[Registry]:
    """Hold the right to change one registered model, and connect to it.

    It holds between all stores of a SQLite or PostgreSQL registry. For any other it holds within this store, and
    `Registry.promote` looks once more at the champion before it moves the alias.

    Raises:
        TransientError: MLflow does not answer.
        LockedError: another promotion takes longer than a quarter of an hour.
    """
    uri = resolve_uri(config, store_root)
    with (
        reachable(uri, what=f"registered model {model}"),
        registry_lock.hold(uri, store_root, model, wait_s=_LEASE_WAIT_S),
    ):
        yield Registry(connect(config, store_root), uri, model, store_root)


def rollback(store_root: Path, model: str, *, config: TrackingConfig | None = None, why: str = "") -> history.Record:
    """Restore the previous champion of a registered model, and return the line written to the history.

    Args:
        store_root: root of the store.
        model: name of the registered model.
        config: where MLflow is; default: where the champion was registered.
        why: reason, for the history.

    Raises:
        ConfigError: there is no earlier champion.
        TransientError: MLflow does not answer.
    """
    with opened(config or current.where(store_root, model), store_root, model) as registry:
        return registry.rollback(why)


def list_models(store_root: Path, config: TrackingConfig | None = None) -> list[dict[str, Any]]:
    """Return one row per version of every registered model; see `listing.rows`."""
    known = history.models(store_root)
    return listing.rows(config or current.where(store_root, known[-1] if known else None), store_root)
