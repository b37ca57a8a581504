"""One module per noun; each route is its dependencies, one call, one answer."""

from arkor_ray.api.routes import auth, checkpoints, events, health, inference, jobs, openai, projects, tokens

ROUTERS = tuple(
    module.router for module in (auth, tokens, projects, jobs, events, checkpoints, inference, openai, health)
)
