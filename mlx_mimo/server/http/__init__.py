"""HTTP: connections, who may use the server, bodies, routes. Starlette on uvicorn."""
