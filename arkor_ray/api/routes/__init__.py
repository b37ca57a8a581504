"""One module per noun; each route is its dependencies, one call, one answer."""

from arkor_ray.api.routes import auth, checkpoints, endpoints, events, health, inference, jobs, models, projects, tokens

ROUTERS = tuple(
    module.router
    for module in (auth, tokens, projects, jobs, events, checkpoints, inference, endpoints, models, health)
)
