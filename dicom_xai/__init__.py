"""dicom_xai: a study comes in by C-STORE; its explained prediction goes back within two seconds.

The tree is the flow::

    study stages errors uids identity     the words: import nothing of ours
    config telemetry dimse spool          the means: import the words only
    receive route decode infer explain encode deliver
                                          the flow: one package per stage, in this order
    autodiff                              ONNX in, ONNX with gradients out; knows no DICOM
    ledger                                the facts, durable: verbs over SQL
    pipeline service                      one job on one page; the roles and their supervision
    cli demo                              the faces

Read `study` (what flows), `pipeline` (in what order), then the stage you care for.
"""

__version__ = "0.1.0"
