"""Serves an engine over HTTP: OpenAI's chat completions, the web page and metrics.

Read app.py, completions.py, answers.py and turns.py first; then gate.py, hosts.py and connection.py, which protect the
server.
"""
