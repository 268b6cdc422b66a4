"""A model as a folder of static files, which a browser runs without a server.

    folder.write -> packages.fetch (npm) -> exporter.graph.unpacked -> what any file server hands out

`static/` holds the JavaScript beside the server's page, `npm/` the locked packages that it stands on: transformers.js with
onnxruntime-web.
"""
