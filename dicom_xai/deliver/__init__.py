"""Deliver: results go out by C-STORE; when is one tried again?"""
