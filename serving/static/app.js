// Puts the page together: models, key, chat and the picture of the pool.

import { apiKey, getJson, setApiKey } from "./api.js";
import { Chat } from "./chat.js";
import { PoolPanel } from "./pool.js";

const find = (id) => document.getElementById(id);

async function loadModels() {
  const select = find("model");
  try {
    const { data } = await getJson("v1/models");
    const before = select.value;
    select.replaceChildren(...data.map(({ id }) => new Option(id, id)));
    if (data.some(({ id }) => id === before)) select.value = before;
    select.disabled = false;
  } catch (error) {
    select.replaceChildren(new Option(error.status === 401 ? "needs an API key" : "no answer", ""));
    select.disabled = true;
    if (error.status === 401) find("settings").open = true;
  }
}

const pool = new PoolPanel();
new Chat();
find("key").value = apiKey();
find("key").addEventListener("change", () => {
  setApiKey(find("key").value.trim());
  loadModels();
  pool.update();
});
find("sheet").addEventListener("submit", (event) => {
  event.preventDefault();
  find("settings").open = false;
});
document.addEventListener("click", (event) => {
  if (!find("settings").contains(event.target)) find("settings").open = false;
});
loadModels();
