// The chat page's own script on a small stand-in for the browser: what it sends after replies that failed.
const html = require("fs").readFileSync(process.argv[1], "utf8"), elements = {}, sent = [];
const script = html.match(/<script>([^]*)<\/script>/)[1];
const element = () => ({append() {}, firstChild: {}, set textContent(t) {},
  get textContent() { return ""; }, value: ""});
elements.talk = {...element(), shown: [], append(box) { this.shown.push(box.className); }, scrollTop: 900,
  clientHeight: 100, scrollHeight: 1000};
elements.form = {requestSubmit() { this.onsubmit({preventDefault() {}}); }};
globalThis.document = {getElementById: id => elements[id] ??= element(), createElement: element};
let way = "", waiting = null;
const event = delta => "data: " + JSON.stringify(delta) + "\n\n";
const word = t => event({choices: [{delta: {content: t}}]});
globalThis.fetch = async (url, options) => {
  if (url === "/v1/models") return new Response(JSON.stringify({data: [{id: "m"}]}));
  sent.push(JSON.parse(options.body).messages);
  if (way === "busy") return new Response(JSON.stringify({error: {message: "overloaded"}}), {status: 429});
  if (way === "down") throw new TypeError("Failed to fetch");
  const stop = () => Object.assign(new Error("aborted"), {name: "AbortError"});
  if (way === "stopped before") throw stop();
  if (way === "new") await new Promise(go => waiting = go);
  if (way === "new breaks") { await new Promise(go => waiting = go); throw new TypeError("Failed to fetch"); }
  return new Response(new ReadableStream({async pull(c) {
    const put = t => c.enqueue(new TextEncoder().encode(t));
    if (way === "says nothing") { put(event({choices: [{delta: {}}]})); c.close(); return; }
    if (this.begun && way === "enter") {
      elements.talk.scrollTop = 0; elements.text.value = "more";
      elements.text.onkeydown({key: "Enter", preventDefault() {}});
      console.log("enter stops: " + options.signal.aborted);
      put(word("again")); way = "ok"; return;
    }
    if (this.begun && way === "stopped after") { c.error(stop()); return; }
    if (this.begun) { if (way === "breaks") put(event({error: {message: "broken"}})); c.close(); return; }
    this.begun = true;
    const tool = (kind, text) => put(event({choices: [{delta: {content: "", tool: {[kind]: text}}}]}));
    if (way === "calls") {
      for (const [call, result] of [["6*", "4"], ["1+1", "2"]]) {
        tool("call", call); if (call === "6*") { tool("call", "7"); }
        tool("result", result); if (call === "6*") { tool("result", "2"); }
      }
      put(word("It is 42.")); tool("call", "1+"); return;
    }
    put(word("Hel")); put(word("lo."));
  }}));
};
const page = (0, eval)(`(() => { ${script}; return {ask}; })()`);
(async () => {
  for (way of ["busy", "down", "stopped before", "says nothing", "stopped after", "breaks", "ok", "calls", "new", "new breaks", "enter"]) {
    elements.talk.shown = []; elements.talk.scrollTop = 900;
    const now = way, first = page.ask("one");
    if (now.startsWith("new")) { elements.new.onclick(); way = "ok"; await page.ask("two"); waiting(); await first; }
    else await first;
    if (now === "enter") console.log("scrolled up: " + (elements.talk.scrollTop === 0));
    if (now === "new breaks") console.log("errors: " + elements.talk.shown.includes("error"));
    way = "ok"; await page.ask("last");
    console.log(now + ": " + sent.at(-1).map(m => m.role[0] + " " + m.content +
      (m.tool_steps ? " " + JSON.stringify(m.tool_steps) : "")).join(", "));
    elements.new.onclick();
  }
})();
