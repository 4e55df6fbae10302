"""The process: protocol, client, server, scheduler, engine, command line."""
