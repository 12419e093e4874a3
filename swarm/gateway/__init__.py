"""The swarm's text over HTTP, as applications ask for it: an OpenAI-compatible API, and a page. Start at app.make_app.

Needs the extra `gateway` (FastAPI, uvicorn, prometheus_client); nothing else imports this package.
"""
