"""SGLang imports the modules of this package instead of its own 250 models: `platform.engine.engine_environment`."""
