// The search of the pages runs in a web worker, which browsers refuse to pages that are opened from a folder
// (file://). There this class takes the worker's place: it loads the same script into an empty, hidden frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = this.inside.document.createElement("script");
      script.src = url;
      script.onload = () => {
        this.isReady = true;
        for (const data of this.waiting) this.postMessage(data);
      };
      this.inside.document.body.append(script);
    }

    postMessage(data) {
      if (this.isReady) this.inside.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
  };
