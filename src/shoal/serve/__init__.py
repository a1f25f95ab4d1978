"""A server with the interface of OpenAI for one model, under a plan or as it is: `shoal serve`."""
