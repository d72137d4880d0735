"""Has SGLang's HTTP server answer `/generate` in the compact form of `packed_answers.py` when a request asks for it."""


def register() -> None:
    """Run in an engine's server process before it serves. Requests without the Accept header are SGLang's as before."""
    from fastapi import Request, Response
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import GenerateReqInput

    from megatron_dsrl.rollout.engines.packed_answers import MEDIA_TYPE, pack

    async def generate(obj: GenerateReqInput, request: Request) -> Response:
        if request.headers.get("accept") != MEDIA_TYPE:
            return await http_server.generate_request(obj, request)
        try:
            manager = http_server.get_global_state().tokenizer_manager
            answers = await anext(manager.generate_request(obj, request))
        except ValueError as error:
            return Response(str(error), status_code=getattr(error, "status_code", 400))
        return Response(pack(answers), media_type=MEDIA_TYPE)

    routes = http_server.app.router.routes
    http_server.app.post("/generate", response_model=None)(generate)
    routes.insert(0, routes.pop())  # the first route of a path is the one that is used
