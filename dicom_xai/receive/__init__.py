"""Receive: objects come in by C-STORE; when is a unit complete?"""
