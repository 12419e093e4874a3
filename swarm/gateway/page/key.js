// The API key, if this gateway wants one. It is kept for this tab only.
const STORE = "swarm-key";
const dialog = document.getElementById("key-dialog");
const input = document.getElementById("key");
let asking = null;

function headers(more) {
  const key = sessionStorage.getItem(STORE);
  return key ? { ...more, Authorization: `Bearer ${key}` } : { ...more };
}

function askForKey(words) {
  if (asking) return asking;
  asking = new Promise((resolve) => {
    document.getElementById("key-words").textContent = words;
    input.value = "";
    dialog.addEventListener("close", () => {
      asking = null;
      if (input.value) sessionStorage.setItem(STORE, input.value.trim());
      resolve(Boolean(input.value));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// A fetch that asks for a key where one is needed, as often as a wrong one is given.
export async function ask(path, options = {}) {
  for (;;) {
    const answer = await fetch(path, { ...options, headers: headers(options.headers) });
    if (answer.status !== 401) return answer;
    const had = sessionStorage.getItem(STORE) !== null;
    sessionStorage.removeItem(STORE);
    const words = had ? "This key is not known here. Give another one." : "This gateway asks for a key. It stays in this tab.";
    if (!(await askForKey(words))) return answer;
  }
}

// What an answer that is an error says.
export async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the gateway answered ${answer.status}`;
  }
}
