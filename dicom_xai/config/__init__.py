"""The three YAML files an admin edits: one frozen model per section; load, check, nearest word.

`service` (with its sections `tls` and `audit`), `routes` and `cards` are the files, `types` their
single values; `reading` turns YAML into a model and says where it is wrong; `loading` checks the
files against each other; `schema` writes JSON Schemas for editors.

Every scalar is read as text and typed by its model, so that ``NO``, ``0123`` and ``12:30`` never
change an AE title or a code (PyYAML's YAML 1.1 resolver would read false, 83 and 750). Unknown and
duplicate keys are errors. All problems of a file are reported at once, each with file, line and
column and, where a word is wrong, the nearest known one.

Relative paths are relative to the folder of the file in which they stand.
"""

from dicom_xai.config.audit import AuditConfig, SyslogConfig
from dicom_xai.config.cards import (
    Align,
    Code,
    Grid,
    HeatmapScale,
    InputKind,
    MinimumRegion,
    ModelCard,
    ModelClass,
    ModelInput,
    ModelOutput,
    Preference,
    ResizeRule,
    StackAttribute,
    StackOrientation,
    StackRule,
    Windowing,
    WindowSource,
)
from dicom_xai.config.loading import (
    Config,
    load,
)
from dicom_xai.config.reading import (
    MAX_YAML_BYTES,
    Problem,
    ProblemsError,
    parse,
    read_yaml,
)
from dicom_xai.config.routes import (
    Clause,
    Layout,
    Route,
    RoutesConfig,
    RouteTest,
    SegmentationKind,
    SendRule,
    TriggerKind,
    read_route,
)
from dicom_xai.config.service import (
    Allowed,
    Compression,
    Destination,
    IgnoredKind,
    Listener,
    ReceiveConfig,
    Requester,
    ServiceConfig,
    parse_address,
)
from dicom_xai.config.tls import ClientTLS, ListenerTLS, Secret
from dicom_xai.config.types import (
    SENDER_FACTS,
    nearest,
)

__all__ = [
    "MAX_YAML_BYTES",
    "SENDER_FACTS",
    "Align",
    "Allowed",
    "AuditConfig",
    "Clause",
    "ClientTLS",
    "Code",
    "Compression",
    "Config",
    "Destination",
    "Grid",
    "HeatmapScale",
    "IgnoredKind",
    "InputKind",
    "Layout",
    "Listener",
    "ListenerTLS",
    "MinimumRegion",
    "ModelCard",
    "ModelClass",
    "ModelInput",
    "ModelOutput",
    "Preference",
    "Problem",
    "ProblemsError",
    "ReceiveConfig",
    "Requester",
    "ResizeRule",
    "Route",
    "RouteTest",
    "RoutesConfig",
    "Secret",
    "SegmentationKind",
    "SendRule",
    "ServiceConfig",
    "StackAttribute",
    "StackOrientation",
    "StackRule",
    "SyslogConfig",
    "TriggerKind",
    "WindowSource",
    "Windowing",
    "load",
    "nearest",
    "parse",
    "parse_address",
    "read_route",
    "read_yaml",
]
