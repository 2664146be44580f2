"use strict";
fetch("/v1/models")
  .then((response) => (response.ok ? response.json() : Promise.reject(response.status)))
  .then((models) => (document.getElementById("model").value = models.data.map((model) => model.id).join(", ")))
  .catch((error) => (document.getElementById("model").value = `not known (${error})`));
