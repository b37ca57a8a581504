"""One module per noun; each route is its dependencies, one call, one answer."""

from arkor_ray.api.routes import (
    auth,
    checkpoints,
    endpoints,
    events,
    health,
    inference,
    jobs,
    openai,
    projects,
    public,
    runs,
    tokens,
)

ROUTERS = tuple(
    module.router
    for module in (
        auth, tokens, projects, jobs, events, checkpoints, inference, endpoints, runs, openai, public, health,
    )
)  # fmt: skip
