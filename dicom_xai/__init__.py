"""dicom_xai: a study comes in by C-STORE; its explained prediction goes back within two seconds.

The tree is the flow::

    study stages errors uids identity processes deflate commitment
                                          the words: import no more than each other
    tls config telemetry dimse spool audit
                                          the means: import the words, and each other
    receive route decode infer explain encode deliver
                                          the flow: one package per stage, in this order
    prepare                               what can be done with one object alone, as it comes
    autodiff                              ONNX in, ONNX with gradients out; knows no DICOM
    ledger                                the facts, durable: verbs over SQL
    pipeline service                      one job on one page; the roles and their supervision
    cli demo                              the faces

Read `study` (what flows), `pipeline` (in what order), then the stage you care for.
"""

__version__ = "0.1.0"
