import "uplot/dist/uPlot.min.css";
import "./styles/base.css";
import "./styles/frame.css";
import "./styles/compare.css";
import "./styles/reply.css";
import "./styles/tint.css";
import "./styles/composer.css";
import "./styles/cards.css";
import { render } from "preact";
import { App } from "./App";

render(<App />, document.getElementById("app")!);
